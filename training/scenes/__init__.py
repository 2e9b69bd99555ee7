"""The generator of captioned scenes of coloured shapes."""
