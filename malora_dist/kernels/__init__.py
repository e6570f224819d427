"""The fast form of the methods' maths: what training and the PEFT tuner run. torch only, no processes."""
