"""What carries: typed messages over ZeroMQ, slabs over NCCL or gloo."""
