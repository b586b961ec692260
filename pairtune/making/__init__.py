"""Where pairs come from when there are none: answers that were rated become pairs. No torch."""
