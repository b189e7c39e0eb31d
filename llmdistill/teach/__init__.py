"""A teacher: what it is asked, who answers, how answers are kept, read and checked."""
