"""Timings and scores of runtimes: benchmark, accuracy, summarize."""
