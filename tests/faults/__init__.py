"""Killing, full disks, broken disks and signals at a chosen moment, in a process that runs the program as it is.

layer.py wraps what all writing goes through, server.py forks a process a fault, project.py says what a run must come to.
"""
