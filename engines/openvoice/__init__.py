"""OpenVoice v2: a base voice says the text, a converter gives it the enrolled speaker's tone colour."""
