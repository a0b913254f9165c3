"""The version of the package. A separate file, so that a build need not import the package."""

VERSION = "0.1.0"
