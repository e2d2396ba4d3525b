"""What shows a run's metrics while it goes on: one small interface, a file for each tracker."""
