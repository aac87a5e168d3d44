"""What several tests share: cases, the float64 truth, tolerances, upstream gradients, backends, child processes."""
