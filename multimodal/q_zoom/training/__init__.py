"""Training of Q-Zoom's branches and of its model: labels, data, and the stages as Lightning modules."""
