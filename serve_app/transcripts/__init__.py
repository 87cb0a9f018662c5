"""What is said in the recording of a voice: heard by a recogniser, corrected by a person, with times."""
