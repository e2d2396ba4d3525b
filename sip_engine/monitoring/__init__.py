"""What a run writes down of itself and watches; nothing here draws."""
