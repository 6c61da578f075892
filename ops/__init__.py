"""Operations with several implementations: a plain definition, and fast ones tested against it."""
