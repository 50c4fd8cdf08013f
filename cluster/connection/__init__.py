"""Reaching a Ray and its nodes: tokens, names, folders, jobs."""
