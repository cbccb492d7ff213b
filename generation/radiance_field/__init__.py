"""Radiance fields: Switch-NeRF++'s heterogeneous mixture of hash experts, rendering, and the scenes they learn."""
