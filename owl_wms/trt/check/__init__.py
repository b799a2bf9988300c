"""Whether a program is right: parity with the fp32 decoder, its recorded output, calibration of 8-bit codes."""
