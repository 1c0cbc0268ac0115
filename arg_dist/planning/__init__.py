"""What a run would take, by arithmetic: memory and bytes sent, before anything is started."""
