"""Operations on tensors: a file without `_` is one, with its plain-torch definition; with `_`, kernels and checks."""
