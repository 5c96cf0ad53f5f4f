"""Rows by RDMA: reliable-connected queue pairs, registered seats, write-with-immediate."""
