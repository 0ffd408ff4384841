"""The vLLM plugin: TurboQuant layers decode with this project's kernels wherever that is possible, with vLLM's else.

Nothing here imports the tuner's searching half, the template engine or Triton, and nothing touches CUDA before vLLM's
worker has a device.
"""
