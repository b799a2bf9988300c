"""Checks that a program is right: parity with the fp32 decoder, recorded output, calibration of 8-bit codes."""
