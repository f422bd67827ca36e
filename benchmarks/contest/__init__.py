"""The side-by-side benchmark's parts, bottom up: cases, referee, contenders, jobs, worker, processes, tables."""
