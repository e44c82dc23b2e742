"""A machine with GPUs that are none, for tests on a CPU build of torch.

Tensors say that they are on cuda:k, lie in memory of their own, and are computed by torch's CPU
kernels. An operator refuses tensors of different devices; "nccl" is gloo that accepts tensors of
GPUs alone, one GPU a rank. So the whole program runs as on GPUs, in any number of processes, and
what a GPU would launch and what the host would wait for is counted.

It does not see: asynchrony (all is done when a call returns), the arithmetic and speed of a GPU,
Triton, NCCL itself.

    python -m tests.pretended_cuda python -m fedrun fed_avg --device cuda ...

runs a command there. In tests, the fixture `pretended_cuda` is the environment of such a process.
PRETENDED_GPUS is the number of devices (default 8), which CUDA_VISIBLE_DEVICES restricts as usual.
With PRETENDED_LOG, a folder, a process leaves a file there for each device that it has used.
"""
