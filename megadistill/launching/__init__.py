"""Starting ranks on the hosts of a hostfile, and starting them again. Imports no torch.

hostfile.py   the hosts and their slots
connection.py the command that runs a program on a host: over ssh, or here
probe.py      on each host: the machine, its interpreter, its checkout
reach.py      asks every host, and names those that cannot take part
agent.py      on each host: starts the ranks, and ends them with the connection
rounds.py     starts all agents, forwards signals, starts again
"""
