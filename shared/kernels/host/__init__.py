"""Kernels on the CPU: an emulator of the machine that they are written for, and a device around it."""
