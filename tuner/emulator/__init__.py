"""The CPU emulator: its C++ run time, how kernels are compiled against it, and what passes to and fro."""
