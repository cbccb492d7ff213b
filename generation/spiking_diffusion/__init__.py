"""Spiking diffusion: SDDPM and SDM, diffusion models of spiking neurons, with an honest account of their energy."""
