"""The owner's side of Offsite-Tuning: build an emulator, distil it, measure it, plug tuned ends in."""
