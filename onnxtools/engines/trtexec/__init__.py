"""The builder `trtexec`: the command line of NVIDIA's tool."""
