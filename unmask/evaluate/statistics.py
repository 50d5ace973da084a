"""Is it more than noise: bootstrap intervals and paired tests over per-example values."""
