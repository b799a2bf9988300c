"""`python -m owl_wms`: the command line, in the form that torchrun can start (`torchrun -m owl_wms train ...`)."""

from owl_wms.cli import main

if __name__ == "__main__":
    main()
