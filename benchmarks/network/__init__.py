"""Several hosts on one machine: network namespaces joined by a switch, and what a network costs."""
