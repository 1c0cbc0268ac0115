"""Cost of a network, measured on several hosts on one machine: network namespaces and a switch."""
