"""Export: programs for phones and other runtimes, each proven to compute what PyTorch computes before it is shipped."""
