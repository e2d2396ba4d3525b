"""GPU operations: each file holds one operation, its plain-torch definition and its Triton kernel."""
