"""Export: programs for phones and other runtimes, each verified against PyTorch before it is kept."""
