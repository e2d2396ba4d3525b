"""Every setting of a run: the schema, and how TOML files and command lines become it."""
