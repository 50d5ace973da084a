"""From a decoder to a trained encoder: MNTP, SimCSE and supervised contrastive training. A run is one TOML file."""
