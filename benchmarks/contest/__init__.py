"""The side-by-side benchmark's parts.

Bottom up: cases, referee, contenders, jobs, worker, processes, tables.
"""
