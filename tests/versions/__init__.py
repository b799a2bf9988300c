"""The supported version sets, each in an environment of its own; pytest finds no tests here."""
