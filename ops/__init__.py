"""Operations with several implementations: one plain definition, fast backends tested against it."""
