"""What the host backends share: threads, memory and the threads of BLAS."""
