"""What trainers of banks with concepts of each class share: they differ only in how they learn the concepts of one."""
