"""The package's version, in a file of its own so that builds need not import the package."""

VERSION = "0.1.0"
