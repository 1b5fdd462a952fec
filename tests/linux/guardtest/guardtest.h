/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What the parts of guardtest share.
 */
#ifndef GUARDTEST_H
#define GUARDTEST_H

#include <stddef.h>
#include <stdint.h>

#include <linux/virtio_guard.h>

#define PAGE	4096UL
#define NO	VIRTIO_GUARD_NO_INDEX
/* Far above any RAM, within what a page table entry can hold. */
#define NO_RAM	(1ULL << 39)

/* guardtest.c */
extern int failed;

void report(const char *name, int ok);
int ask(int fd, unsigned long call, const struct guard_range *ranges,
	uint32_t count, struct guard_lock *req);
int query(int fd, uint64_t first, uint64_t last, struct guard_range *ranges,
	  uint32_t room, struct guard_query *req);
uint64_t frame_of(const void *page);
unsigned char *pages(size_t count);
int refused(void (*access)(volatile unsigned char *at),
	    volatile unsigned char *at);
void store(volatile unsigned char *at);

/* events.c */
int next_event(int fd, struct guard_event *event);
void test_events(int fd);
int test_hang_up(const char *device);

/* rights.c */
void test_rights(int fd);

#endif /* GUARDTEST_H */
