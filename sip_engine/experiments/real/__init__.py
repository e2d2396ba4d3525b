"""`sip real`: the method on text and with models that nobody here made, measured by what did not train it."""
