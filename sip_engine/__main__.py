"""`python -m sip_engine COMMAND`: the `sip` command for launchers that want a module, such as torchrun."""

from sip_engine.cli import main

if __name__ == "__main__":
    main()
