"""Where pairs come from when there are none: answers are drawn and judged, rated answers become pairs. No torch."""
