"""Work on more than one machine, by Ray. Ray places processes and carries calls; what is computed is decided elsewhere.

No other package imports ray, and this one imports it only when a cluster is named.
"""
