"""Other inference engines, each in a process and an environment of its own (`setup.sh`).

Nothing here imports ercbatch, which those environments don't have.
"""
