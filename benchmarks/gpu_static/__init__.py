"""GPU kernels read without a GPU: computed figures, none of them measured.

compiling.py compiles every kernel as the host code launches it; sass.py reads the machine code;
simulator.py runs one loop of it on a model of an SM; kernels.py makes figures per step of that;
bounds.py makes times of whole models of those; report.py is the command.
"""
