"""Operations of a tower: a registry of implementations for each device and dtype, checked against the reference."""
