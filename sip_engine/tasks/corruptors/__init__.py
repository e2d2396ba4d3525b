"""Corruptors: they spoil a suffix, so that a pair has a known answer."""
